"""Every test in this folder runs inside the real host."""

import pytest

from hosting import prepare_host

prepare_host()


@pytest.fixture
def places(tmp_path, monkeypatch):
    """Registered roots: ComfyUI/datasets, a second path as extra_model_paths.yaml adds one, and the input folder."""
    import folder_paths

    from lora_loom.host import folders

    monkeypatch.setattr(folder_paths, "base_path", str(tmp_path / "comfy"))
    monkeypatch.setattr(folder_paths, "input_directory", str(tmp_path / "comfy/input"))
    monkeypatch.setattr(folder_paths, "output_directory", str(tmp_path / "comfy/output"))
    registered = {name: (list(paths), kinds) for name, (paths, kinds) in folder_paths.folder_names_and_paths.items()}
    registered["datasets"] = ([str(tmp_path / "elsewhere/sets")], set())
    monkeypatch.setattr(folder_paths, "folder_names_and_paths", registered)
    monkeypatch.setattr(folders, "LISTING_SECONDS", -1.0)
    for name in ("comfy/datasets", "comfy/input", "elsewhere/sets"):
        (tmp_path / name).mkdir(parents=True)
    return tmp_path
