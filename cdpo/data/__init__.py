"""From text to Items to Batches. conf/dataset/ names these classes; a source of your own extends Dataset or Source."""

from cdpo.data.bandit import Bandit
from cdpo.data.records import Record
from cdpo.data.rows import BadRow, Data, Dataset, Ledger, Row
from cdpo.data.sources import Hub, Jsonl, Source

__all__ = ["BadRow", "Bandit", "Data", "Dataset", "Hub", "Jsonl", "Ledger", "Record", "Row", "Source"]
