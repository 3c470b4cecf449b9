"""Kolors Nodes: Kwai-Kolors for ComfyUI, and for running the same graphs without it."""

from __future__ import annotations

# A checkout's folder name may be no Python identifier; then test collection reads this file without a package.
if __package__:
    from .nodes.encode import KolorsTextEncode
    from .nodes.loaders import (
        DownloadAndLoadChatGLM3,
        DownloadAndLoadKolorsModel,
        KolorsVAELoader,
        LoadChatGLM3,
        LoadKolorsUNet,
    )
    from .nodes.lora import KolorsApplyLora, KolorsLoraLoader, KolorsSaveLora, LoadKolorsLoRA
    from .nodes.sampler import KolorsSampler
    from .nodes.speed import KolorsSpeed
    from .nodes.training import KolorsLoraDataset, KolorsTrainLora, KolorsTrainOptions

    NODE_CLASS_MAPPINGS = {
        "DownloadAndLoadKolorsModel": DownloadAndLoadKolorsModel,
        "DownloadAndLoadChatGLM3": DownloadAndLoadChatGLM3,
        "LoadChatGLM3": LoadChatGLM3,
        "LoadKolorsUNet": LoadKolorsUNet,
        "KolorsVAELoader": KolorsVAELoader,
        "KolorsTextEncode": KolorsTextEncode,
        "KolorsSampler": KolorsSampler,
        "LoadKolorsLoRA": LoadKolorsLoRA,
        "KolorsLoraLoader": KolorsLoraLoader,
        "KolorsApplyLora": KolorsApplyLora,
        "KolorsSaveLora": KolorsSaveLora,
        "KolorsLoraDataset": KolorsLoraDataset,
        "KolorsTrainOptions": KolorsTrainOptions,
        "KolorsTrainLora": KolorsTrainLora,
        "KolorsSpeed": KolorsSpeed,
    }
    NODE_DISPLAY_NAME_MAPPINGS = {
        "DownloadAndLoadKolorsModel": "(Down)load Kolors Model",
        "DownloadAndLoadChatGLM3": "(Down)load ChatGLM3 Model",
        "LoadChatGLM3": "Load ChatGLM3 Model",
        "LoadKolorsUNet": "Load Kolors UNet",
        "KolorsVAELoader": "Load Kolors VAE",
        "KolorsTextEncode": "Kolors Text Encode",
        "KolorsSampler": "Kolors Sampler",
        "LoadKolorsLoRA": "Load Kolors LoRA",
        "KolorsLoraLoader": "Kolors LoRA Loader",
        "KolorsApplyLora": "Kolors Apply LoRA",
        "KolorsSaveLora": "Kolors Save LoRA",
        "KolorsLoraDataset": "Kolors LoRA Dataset",
        "KolorsTrainOptions": "Kolors Train Options",
        "KolorsTrainLora": "Kolors Train LoRA",
        "KolorsSpeed": "Kolors Speed",
    }
    WEB_DIRECTORY = "./web"
    __all__ = ["NODE_CLASS_MAPPINGS", "NODE_DISPLAY_NAME_MAPPINGS", "WEB_DIRECTORY"]
