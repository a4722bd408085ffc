"""A file of queries to train on need not have queries to evaluate; any other file must."""

import pytest

from jaxclip.config.schema import Augmentation, Config, Data
from jaxclip.errors import UserError
from jaxclip.evaluation import judged


def test_a_file_with_training_queries_alone_is_evaluated_only_if_it_is_not_trained_on(tmp_path):
    path = tmp_path / "clicks.csv"
    path.write_text("query,product,split\nred shirt,7,train\n")
    data = Data(queries=str(path), split="test")
    assert judged.find(Config(data=data, augmentation=Augmentation(queries=0.5)), ["7"]) is None
    with pytest.raises(UserError, match="clicks.csv has no queries of the split 'test' .it has train."):
        judged.find(Config(data=data), ["7"])
    trained = Config(data=Data(queries=str(path), split="train"), augmentation=Augmentation(queries=0.5))
    assert judged.find(trained, ["7"]).texts == ["red shirt"]
