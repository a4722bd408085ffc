"""Queries with judged products, from the usual layouts of search engines, test collections and click logs."""

from jaxclip.catalog.judgements.judgements import Aligned, Judgements
from jaxclip.catalog.judgements.layouts import read

__all__ = ["Aligned", "Judgements", "read"]
