"""Small checkpoints with weights from a written recipe, so that golden vectors need no binary file.

Tensor i of the sorted names is drawn from PCG64(seed * 1000 + i): uniform with mean 0 and variance 1, times a
standard deviation that depends on what the tensor is. The mask token's embedding is small, and heads of
special tokens are 0.
"""

import json
from pathlib import Path

import numpy as np
from safetensors.numpy import save_file

VARIANTS = {
    "untied": {
        "seed": 11, "head_std": 7.0, "norm_std": 1.0, "mask": 310, "silent": (310, 300, 301),
        "config": {"bd_size": 32, "hidden_size": 64, "intermediate_size": 176, "num_hidden_layers": 2,
                   "num_attention_heads": 4, "num_key_value_heads": 2, "vocab_size": 320, "eos_token_id": 300,
                   "max_position_embeddings": 1024, "rms_norm_eps": 1e-6, "rope_theta": 1e6,
                   "tie_word_embeddings": False},
    },
    "tied": {
        "seed": 22, "norm_std": 0.7, "mask": 285, "silent": (),
        "config": {"bd_size": 8, "hidden_size": 96, "intermediate_size": 208, "num_hidden_layers": 3,
                   "num_attention_heads": 6, "num_key_value_heads": 2, "vocab_size": 288, "eos_token_id": 280,
                   "max_position_embeddings": 512, "rms_norm_eps": 1e-5, "rope_theta": 1e4,
                   "tie_word_embeddings": True},
    },
}  # fmt: skip
COMMON = {
    "model_type": "Fast_dLLM_Qwen", "architectures": ["Fast_dLLM_QwenForCausalLM"], "hidden_act": "silu",
    "rope_scaling": None, "use_sliding_window": False, "torch_dtype": "float32",
}  # fmt: skip


def shapes(c: dict) -> dict[str, tuple[int, ...]]:
    """Published tensor names and shapes of a config."""
    hidden, inner, vocab = c["hidden_size"], c["intermediate_size"], c["vocab_size"]
    kv = hidden // c["num_attention_heads"] * c["num_key_value_heads"]
    layer = {"input_layernorm.weight": (hidden,), "post_attention_layernorm.weight": (hidden,)}
    for name, rows in ("q_proj", hidden), ("k_proj", kv), ("v_proj", kv):
        layer |= {f"self_attn.{name}.weight": (rows, hidden), f"self_attn.{name}.bias": (rows,)}
    layer["self_attn.o_proj.weight"] = (hidden, hidden)
    layer["mlp.gate_proj.weight"] = layer["mlp.up_proj.weight"] = (inner, hidden)
    layer["mlp.down_proj.weight"] = (hidden, inner)
    names = {"model.embed_tokens.weight": (vocab, hidden), "model.norm.weight": (hidden,)}
    if not c["tie_word_embeddings"]:
        names["lm_head.weight"] = (vocab, hidden)
    for i in range(c["num_hidden_layers"]):
        names |= {f"model.layers.{i}.{name}": shape for name, shape in layer.items()}
    return names


def weight(name: str, shape: tuple[int, ...], index: int, v: dict) -> np.ndarray:
    """One tensor of the recipe, float32."""
    generator = np.random.Generator(np.random.PCG64(v["seed"] * 1000 + index))
    u = (generator.random(shape) - 0.5) * 12**0.5
    if name == "model.norm.weight":
        u *= v["norm_std"]
    elif name.endswith("layernorm.weight"):
        u = 1 + 0.2 * u
    elif name.endswith("bias"):
        u *= 0.1 if "v_proj" in name else 0.5
    elif name == "lm_head.weight":
        u *= v["head_std"] / shape[-1] ** 0.5
        u[list(v["silent"])] = 0
    elif name == "model.embed_tokens.weight":
        u[v["mask"]] *= 0.15
    else:
        u *= 1.6 / shape[-1] ** 0.5
    return u.astype(np.float32)


def build(folder: Path, variant: str) -> Path:
    """Write one variant as a checkpoint folder in the published format."""
    v = VARIANTS[variant]
    names = shapes(v["config"])
    weights = {name: weight(name, names[name], i, v) for i, name in enumerate(sorted(names))}
    folder.mkdir(parents=True)
    save_file(weights, folder / "model.safetensors")
    config = v["config"] | COMMON | {"mask_token_id": v["mask"]}
    (folder / "config.json").write_text(json.dumps(config))
    return folder
