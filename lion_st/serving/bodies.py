"""What requests to a server look like, as pydantic reads and checks them."""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import BaseModel, ConfigDict, Field, model_validator

Texts = str | list[str]
LARGEST = 1e15  # of a number in a vector: sums of products of two such are far from the end of float32
Weight = Annotated[float, Field(ge=0, le=LARGEST)]
Coordinate = Annotated[float, Field(ge=-LARGEST, le=LARGEST)]


class Body(BaseModel):
    """JSON whose values are of the types that are asked for: "5" is not a number."""

    model_config = ConfigDict(strict=True)


class EmbedSparseRequest(Body):
    """Body of `/embed_sparse` and `/embed_all`."""

    inputs: Texts
    truncate: bool | None = None
    truncation_direction: str | None = None
    prompt_name: str | None = None

    @model_validator(mode="after")
    def _cut_at_the_end(self) -> EmbedSparseRequest:
        if (self.truncation_direction or "right").lower() != "right":
            raise ValueError(f"texts are cut at the right alone, got truncation_direction={self.truncation_direction}")
        return self


class EmbedRequest(EmbedSparseRequest):
    """Body of `/embed`."""

    normalize: bool | None = None
    dimensions: int | None = None


class OpenAIRequest(Body):
    """Body of `/v1/embeddings`; `prompt_name` is not OpenAI's, whose clients send it as `extra_body`."""

    input: Texts
    prompt_name: str | None = None
    model: str | None = None
    user: str | None = None
    encoding_format: Literal["float", "base64"] | None = None
    dimensions: int | None = None


class SparseValue(Body):
    """A term of a sparse vector, as `/embed_sparse` answers with it."""

    index: Annotated[int, Field(ge=0, lt=2**31)]
    value: Weight


class BothVectors(Body):
    """Both vectors of a text, for an index of a hybrid model."""

    model_config = ConfigDict(extra="forbid")

    sparse: list[SparseValue]
    dense: list[Coordinate]


class SearchRequest(Body):
    """Body of `/search`: texts, or vectors as `/embed`, `/embed_sparse` and `/embed_all` answer with them."""

    model_config = ConfigDict(extra="forbid")

    inputs: Texts | None = None
    vectors: (
        list[list[SparseValue]] | list[list[Coordinate]] | list[list[list[Coordinate]]] | list[BothVectors] | None
    ) = None
    k: Annotated[int, Field(ge=1)] = 10
    reasons: Annotated[int, Field(ge=0, le=1000)] = 0
    texts: bool = True
    truncate: bool | None = None

    @model_validator(mode="after")
    def _one_of_both(self) -> SearchRequest:
        if (self.inputs is None) == (self.vectors is None):
            raise ValueError("give inputs or vectors, one of both")
        return self
