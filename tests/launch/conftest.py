import pytest

from tests.launch.stub import make_tree


@pytest.fixture(scope="session")
def tree(tmp_path_factory):
    """A repository with the real launch/ and engine/launch, else a stub, at a path with a space."""
    return make_tree(tmp_path_factory.mktemp("tree") / "my repository")
