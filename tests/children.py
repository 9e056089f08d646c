"""Processes that tests start and kill: each is forked from one server that imports the slow libraries
once."""
import multiprocessing

CHILDREN = multiprocessing.get_context("forkserver")
CHILDREN.set_forkserver_preload([  # the list set last is the one that counts, so there is one for all tests
    "musekit.training.callbacks",
    "musekit.recipes.encode",
    "musekit.data.digits",
    "musekit.models.uvit",
    "musekit.shards.command",
    "sklearn.datasets",
    "transformers.optimization",
    "torch._dynamo",
])
