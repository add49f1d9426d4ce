"""The Hub on loopback behaves to huggingface_hub as the real one does."""

from hub_clients import run_python, start_python

EVERYDAY = """
from huggingface_hub import CommitOperationAdd, CommitOperationCopy, CommitOperationDelete, HfApi, hf_hub_download
from huggingface_hub import snapshot_download
from huggingface_hub.errors import EntryNotFoundError, HfHubHTTPError, RevisionNotFoundError

api, repo = HfApi(), "org/model"
told = {"whoami": api.whoami()["name"]}
api.create_repo(repo, private=True)
api.create_repo(repo, exist_ok=True)
weights = bytes(range(256)) * 40
first = api.create_commit(repo, [CommitOperationAdd("README.md", b"---\\ntags: [lion]\\n---\\n# A"),
    CommitOperationAdd("model.safetensors", weights), CommitOperationAdd("1_Pooling/config.json", b"{}")],
    commit_message="First")
again = api.create_commit(repo, [CommitOperationAdd("model.safetensors", weights)], commit_message="Nothing new")
api.create_branch(repo, branch="feature/twin")
second = api.create_commit(repo, [CommitOperationCopy("model.safetensors", "copy.safetensors"),
    CommitOperationDelete("1_Pooling/", is_folder=True)], revision="feature/twin", commit_message="Second")
api.create_tag(repo, tag="v1", revision=first.oid)
request = api.create_commit(repo, [CommitOperationAdd("a.txt", b"a")], commit_message="Ask", create_pr=True)
told |= {
    "unchanged": again.oid == first.oid,
    "files": {ref: sorted(api.list_repo_files(repo, revision=ref)) for ref in ("main", "feature/twin", "refs/pr/1")},
    "top": sorted(entry.path for entry in api.list_repo_tree(repo, revision="v1")),
    "tag": api.model_info(repo, revision="v1").sha == first.oid,
    "tags": api.model_info(repo).tags,
    "request": request.pr_num,
    "branches": sorted(branch.name for branch in api.list_repo_refs(repo).branches),
    "lfs": api.get_paths_info(repo, ["model.safetensors"])[0].lfs.size,
    "commit": api.list_repo_commits(repo, revision="feature/twin")[0].title,
    "search": [model.id for model in api.list_models(author="org")],
    "same": open(hf_hub_download(repo, "copy.safetensors", revision="feature/twin"), "rb").read() == weights,
    "snapshot": sorted(os.listdir(snapshot_download(repo, revision="v1"))),
}
head = api.file_exists(repo, "model.safetensors"), api.file_exists(repo, "nothing.txt")
failures = []
bad_card = b"---\\nmodel-index: 3\\n---\\n"
for call in (
    lambda: hf_hub_download(repo, "nothing.txt"),
    lambda: hf_hub_download(repo, "README.md", revision="nowhere"),
    lambda: api.create_commit(repo, [CommitOperationAdd("README.md", bad_card)], commit_message="Bad"),
):
    try:
        call()
    except Exception as error:
        failures.append(type(error).__name__)
from huggingface_hub.utils import get_session
url = f"{os.environ['HF_ENDPOINT']}/{repo}/resolve/main/model.safetensors"
part = get_session().get(url, headers={"Range": "bytes=10-19", "Authorization": "Bearer hf_dummy"})
told |= {"exists": head, "failures": failures, "part": [part.status_code, list(part.content)]}
answer(told)
"""


def test_the_real_client_commits_branches_tags_and_reads(hub, tmp_path):
    told = run_python(hub, tmp_path, EVERYDAY)
    everything = [".gitattributes", "1_Pooling/config.json", "README.md", "model.safetensors"]
    assert told == {
        "whoami": "tester",
        "unchanged": True,
        "files": {
            "main": everything,
            "feature/twin": [".gitattributes", "README.md", "copy.safetensors", "model.safetensors"],
            "refs/pr/1": sorted([*everything, "a.txt"]),
        },
        "top": [".gitattributes", "1_Pooling", "README.md", "model.safetensors"],
        "tag": True,
        "tags": ["lion"],
        "request": 1,
        "branches": ["feature/twin", "main"],
        "lfs": 10_240,
        "commit": "Second",
        "search": ["org/model"],
        "same": True,
        "snapshot": [".gitattributes", "1_Pooling", "README.md", "model.safetensors"],
        "exists": [True, False],
        "failures": ["RemoteEntryNotFoundError", "RevisionNotFoundError", "ValueError"],
        "part": [206, list(range(10, 20))],
    }
    assert len(hub.uploaded) == 1  # the copy and the second commit of the same weights transfer nothing


STRANGERS = """
from huggingface_hub import CommitOperationAdd, HfApi

def attempt(call):
    try:
        call()
        return "done"
    except Exception as error:
        return f"{type(error).__name__} {error.response.status_code}"

add = [CommitOperationAdd("a.txt", b"a")]
answer({
    str(token): [
        attempt(lambda: HfApi(token=token).model_info("org/private")),
        attempt(lambda: HfApi(token=token).create_commit("org/public", add, commit_message="Add")),
        attempt(lambda: HfApi(token=token).create_repo("org/new")),
    ]
    for token in arguments
})
"""


def test_tokens_decide_who_sees_and_writes(hub, tmp_path):
    hub.add("org/private", {"config.json": b"{}"}, private=True)
    hub.add("org/public", {"config.json": b"{}"})
    told = run_python(hub, tmp_path, STRANGERS, [False, "hf_wrong", "hf_other"])
    assert told == {
        "False": ["RepositoryNotFoundError 401", "HfHubHTTPError 401", "HfHubHTTPError 401"],
        "hf_wrong": ["HfHubHTTPError 401"] * 3,
        "hf_other": ["RepositoryNotFoundError 404", "HfHubHTTPError 403", "HfHubHTTPError 403"],
    }
    assert list(hub.files("org/public")) == ["config.json"]


def test_a_transfer_can_be_cut(hub, tmp_path):
    hub.add("org/model", {"config.json": b"{}"})
    code = """
from huggingface_hub import HfApi
HfApi().upload_file(path_or_fileobj=bytes(200_000), path_in_repo="model.safetensors", repo_id="org/model")
answer("done")
"""
    hub.cut_uploads_after = 50_000
    client = start_python(hub, tmp_path, code)
    try:
        assert hub.was_cut.wait(300)
    finally:
        client.kill()
        client.communicate()
    assert list(hub.files("org/model")) == ["config.json"]
    hub.cut_uploads_after = None
    assert run_python(hub, tmp_path, code) == "done"
    assert set(hub.files("org/model")) == {"config.json", "model.safetensors"}
