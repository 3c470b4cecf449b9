"""A pack for the tests against ComfyUI: a stranger's model that wants all memory, and what ComfyUI holds loaded."""

from __future__ import annotations


class ProbeLoadModel:
    """Loads a model of its own and asks for more memory than there is, so that everything else has to leave."""

    @classmethod
    def INPUT_TYPES(cls):
        seed = ("INT", {"default": 0, "min": 0, "max": 2**32})
        return {"required": {"seed": seed}, "optional": {"latent": ("LATENT",)}}

    RETURN_TYPES = ()
    FUNCTION = "load"
    OUTPUT_NODE = True
    CATEGORY = "probe"

    def load(self, seed, latent=None):
        import comfy.model_management as management
        import comfy.model_patcher
        import torch

        before = get_loaded()
        device = management.get_torch_device()
        patcher = comfy.model_patcher.ModelPatcher(torch.nn.Linear(8, 8), device, management.unet_offload_device())
        management.free_memory(1e30, device)  # load_models_gpu does this itself unless the device is the CPU
        management.load_models_gpu([patcher], memory_required=1e9)
        return {"ui": {"before": before, "after": get_loaded()}}


def get_loaded() -> list[str]:
    """Names the networks that ComfyUI counts as loaded; ours are wrapped in a Sequential."""
    import comfy.model_management as management

    names = []
    for loaded in management.current_loaded_models:
        network = loaded.model.model
        names.append(type(network[0] if type(network).__name__ == "Sequential" else network).__name__)
    return names


NODE_CLASS_MAPPINGS = {"ProbeLoadModel": ProbeLoadModel}
