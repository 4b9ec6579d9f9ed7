"""What the user sees: one file per room, one class per node."""

from comfy_api.latest import ComfyExtension, io

from ..host import routes
from .analysing import LoomBlockAnalyser
from .applying import LoomLoRALoaderAdvanced
from .dataset import LoomCombineDatasets, LoomDatasetFromImages, LoomDatasetLoader
from .dataset_check import LoomContactSheet, LoomDatasetLint
from .dataset_exchange import LoomDatasetToGraph, LoomDatasetToTOML, LoomDatasetUpdate
from .dataset_settings import LoomCaptionSettings, LoomConceptSettings, LoomImageSettings
from .files import LoomLoadLoRA, LoomSaveLoRA
from .merging import LoomBakeApplied, LoomMergeLoRA
from .pairs import LoomLoRAPair
from .presets import LoomSavePreset
from .prompting import LoomPromptLoRA
from .settings import (
    LoomAdapterSettings,
    LoomComponentSettings,
    LoomObjectiveSettings,
    LoomOptimizerSettings,
    LoomPreviewSettings,
    LoomRunSettings,
)
from .tag_editor import LoomTagEditor
from .tools import LoomConvertLoRA, LoomExtractLoRA, LoomInspectLoRA, LoomResizeLoRA
from .training import LoomLoRATrainer

NODES: list[type[io.ComfyNode]] = [
    LoomDatasetLoader,
    LoomLoRATrainer,
    LoomAdapterSettings,
    LoomOptimizerSettings,
    LoomObjectiveSettings,
    LoomRunSettings,
    LoomPreviewSettings,
    LoomSaveLoRA,
    LoomLoRALoaderAdvanced,
    LoomCaptionSettings,
    LoomImageSettings,
    LoomConceptSettings,
    LoomDatasetFromImages,
    LoomCombineDatasets,
    LoomDatasetLint,
    LoomContactSheet,
    LoomDatasetToGraph,
    LoomDatasetUpdate,
    LoomDatasetToTOML,
    LoomComponentSettings,
    LoomSavePreset,
    LoomLoadLoRA,
    LoomLoRAPair,
    LoomPromptLoRA,
    LoomBlockAnalyser,
    LoomMergeLoRA,
    LoomBakeApplied,
    LoomExtractLoRA,
    LoomResizeLoRA,
    LoomConvertLoRA,
    LoomInspectLoRA,
    LoomTagEditor,
]


class Extension(ComfyExtension):
    async def get_node_list(self) -> list[type[io.ComfyNode]]:
        routes.register()  # not in on_load, which older hosts never call
        return NODES
