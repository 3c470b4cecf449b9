"""The map of module names, over every module of the full-size UNet, in both directions."""

from __future__ import annotations

import pytest

from kolors_nodes.lora.names import COMFYUI, DIFFSYNTH, DIFFUSERS, KOHYA, KOHYA_SGM, get_kolors_names, get_unet_names

# The order of blocks in DiffSynth-Studio's SDXLUNet (diffsynth/models/sdxl_unet.py at 22e4ae99): R a ResNet block,
# A a transformer, > a push and < a pop of a skip connection, D and U the samplers. One letter is one number.
DIFFSYNTH_BLOCKS = "R>R>D>RA>RA>D>RA>RA>RAR<RA<RA<RAU<RA<RA<RAU<R<R<R"


@pytest.fixture(scope="module")
def kolors():
    return get_kolors_names()


def test_all_560_attention_modules_have_every_name(kolors):
    attention = [module for module in kolors.modules if module.is_attention]
    assert len(attention) == 560
    for name in ("diffusers", "sgm", "diffsynth", "kohya", "processor"):
        assert len({getattr(module, name) for module in attention}) == 560


def test_every_module_with_weights_is_named(kolors):
    """Convolutions, embeddings and norms too: trainers change them."""
    assert len(kolors.modules) == len({module.sgm for module in kolors.modules})
    assert len(kolors.modules) == len({module.diffsynth for module in kolors.modules})
    assert {len(module.shape) for module in kolors.modules} == {1, 2, 4}


def test_every_spelling_leads_back(kolors):
    for module in kolors.modules:
        for alias, _ in module.iterate_aliases():
            assert kolors.by_alias[alias][0] is module


@pytest.mark.parametrize(
    ("alias", "diffusers", "spelling"),
    [  # as published files spell them
        ("blocks.7.transformer_blocks.0.attn1.to_q", "down_blocks.1.attentions.0.transformer_blocks.0.attn1.to_q",
         DIFFSYNTH),
        ("blocks.21.transformer_blocks.9.attn2.to_out", "mid_block.attentions.0.transformer_blocks.9.attn2.to_out.0",
         DIFFSYNTH),
        ("lora_unet_input_blocks_4_1_transformer_blocks_0_attn1_to_q",
         "down_blocks.1.attentions.0.transformer_blocks.0.attn1.to_q", KOHYA_SGM),
        ("lora_unet_output_blocks_2_1_transformer_blocks_9_ff_net_0_proj",
         "up_blocks.0.attentions.2.transformer_blocks.9.ff.net.0.proj", KOHYA_SGM),
        ("lora_unet_output_blocks_5_2_conv", "up_blocks.1.upsamplers.0.conv", KOHYA_SGM),
        ("lora_unet_input_blocks_6_0_op", "down_blocks.1.downsamplers.0.conv", KOHYA_SGM),
        ("lora_unet_label_emb_0_2", "add_embedding.linear_2", KOHYA_SGM),
        ("lora_unet_down_blocks_1_attentions_0_proj_in", "down_blocks.1.attentions.0.proj_in", KOHYA),
        ("diffusion_model.middle_block.1.transformer_blocks.0.attn1.to_v",
         "mid_block.attentions.0.transformer_blocks.0.attn1.to_v", COMFYUI),
        ("unet.up_blocks.1.attentions.1.transformer_blocks.1.attn2.processor.to_out",
         "up_blocks.1.attentions.1.transformer_blocks.1.attn2.to_out.0", DIFFUSERS),
    ],
)  # fmt: skip
def test_published_spellings(kolors, alias, diffusers, spelling):
    module, found = kolors.by_alias[alias]
    assert (module.diffusers, found) == (diffusers, spelling)


def test_diffsynth_numbers_every_step(kolors):
    """Numbers lead to blocks of the right kind, and running through them meets diffusers' blocks in order."""
    kinds = {"resnets": "R", "attentions": "A", "downsamplers": "D", "upsamplers": "U"}
    blocks: dict[int, str] = {}
    for module in kolors.modules:
        first, _, rest = module.diffsynth.partition(".")
        if first == "blocks":
            parts = module.diffusers.split(".")
            blocks[int(rest.split(".")[0])] = ".".join(parts[: 3 if parts[0] == "mid_block" else 4])
    for number, block in blocks.items():
        kind = next(letter for part, letter in kinds.items() if part in block)
        assert DIFFSYNTH_BLOCKS[number] == kind
    assert len(blocks) == sum(letter in "RADU" for letter in DIFFSYNTH_BLOCKS)
    for kind in kinds:
        met = [block for _, block in sorted(blocks.items()) if kind in block]
        expected = list(dict.fromkeys(block for block in blocks.values() if kind in block))
        order = {"down_blocks": 0, "mid_block": 1, "up_blocks": 2}
        assert met == sorted(expected, key=lambda block: (order[block.split(".")[0]], block))


def test_sgm_names_as_diffusers_converts_them(kolors):
    """diffusers' own converter for kohya files, over every linear layer and convolution that it knows."""
    from diffusers.loaders.lora_conversion_utils import (
        _convert_unet_lora_key,
        _maybe_map_sgm_blocks_to_diffusers,
    )

    from kolors_nodes.kolors.unet import KOLORS_UNET_CONFIG, build_unet

    config = build_unet(KOLORS_UNET_CONFIG, device="meta").config
    modules = [
        module
        for module in kolors.modules
        if len(module.shape) > 1 and module.diffusers.split(".")[0] in ("down_blocks", "mid_block", "up_blocks")
    ]
    for module in modules:
        key = f"lora_unet_{module.sgm.replace('.', '_')}.lora_down.weight"
        (renamed,) = _maybe_map_sgm_blocks_to_diffusers({key: None}, config)
        converted = _convert_unet_lora_key(renamed)
        for ending in (".lora.down.weight", "_lora.down.weight", ".lora_down.weight"):
            converted = converted.removesuffix(ending)
        assert kolors.by_alias[f"unet.{converted}"][0] is module
    assert len(modules) > 700


def test_names_follow_the_structure(unet, names, kolors):
    """The numbers of a smaller UNet differ; equal structures are equal, so that they share what is loaded."""
    assert names == get_unet_names(unet)
    assert hash(names) == hash(get_unet_names(unet))
    assert names != kolors
    module = names.by_diffusers["down_blocks.1.attentions.0.transformer_blocks.0.attn1.to_q"]
    assert module.diffsynth.startswith("blocks.5.")  # R>D>RA: one layer a block
    assert module.sgm.startswith("input_blocks.3.1.")
