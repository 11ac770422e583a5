import pytest

from tests.eval import benchmark_rows, tiny_model


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    root = tmp_path_factory.mktemp("eval")
    tiny_model.export(root / "hf")
    benchmark_rows.write(root / "rows")
    return root
