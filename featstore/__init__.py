"""Features of recordings, extracted once into a keyed Zarr store that knows what made every number.

    store = fs.create("songs.zarr")
    fs.extract(fs.corpus("wavs/"), store, parse("log-mel", "f0"))
    store["alto1/nino_dios", "f0"][100:200]
"""

from . import errors
from .batches import Batches, crops, whole
from .corpus import Corpus, Problem, Utterance, corpus
from .extract import Progress, Report, extract, failures
from .plan import Failure, FeaturePlan, Plan, plan, source_now
from .row import Row
from .shares import shard
from .spec import Extractor, Spec
from .splits import Split, split
from .store import Feature, Store, StoredUtterance, Why, create, open
from .view import View
from .writer import Writer

__version__ = "0.1.0"
__all__ = ["Batches", "Corpus", "Extractor", "Failure", "Feature", "FeaturePlan", "Plan", "Problem", "Progress",
           "Report", "Row", "Spec", "Split", "Store", "StoredUtterance", "Utterance", "View", "Why", "Writer", "corpus",
           "create", "crops", "errors", "extract", "failures", "open", "plan", "shard", "source_now", "split",
           "whole"]
