"""What the examples train on: four small image sets, checked, and served in batches.

`sources` says which files make a data set and where they lie, `fetch` downloads
them, `formats` reads them, `pipeline` makes batches of them.
"""

from examples.data.pipeline import standardizer, test_batches, train_batches
from examples.data.sources import Dataset, load

__all__ = ["Dataset", "load", "standardizer", "test_batches", "train_batches"]
