"""Processes of their own that need not import what they run: forked from one that has imported it and run nothing."""

import multiprocessing

FORKSERVER = multiprocessing.get_context("forkserver")
FORKSERVER.set_forkserver_preload(["sentence_transformers", "lion_st.encoding.on_ray", "lion_st.losses"])
