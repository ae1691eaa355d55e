# SPDX-License-Identifier: Apache-2.0
"""GPU memory that training and rollouts will need."""

from avar_verl.attention.capture import find_decoder
from avar_verl.tools.doctor.check import Finding, check
from avar_verl.tools.doctor.subject import Subject, count

# Bytes per parameter under FSDP with Adam: bfloat16 copy; float32 parameter, gradient, and two moments.
COPY, MASTER, GRADIENT, MOMENTS = 2, 4, 4, 8
GIB = 2**30


def size(num_bytes: float) -> str:
    """Bytes in the largest unit that keeps the number above 1."""
    unit, factor = next((item for item in (("GiB", 2**30), ("MiB", 2**20)) if num_bytes >= item[1]), ("KiB", 2**10))
    number = num_bytes / factor
    return f"{number:.0f} {unit}" if number >= 100 else f"{number:.3g} {unit}"


@check(
    "memory",
    prevents="A model that does not fit ends the run at its first step, after loading the data and starting vLLM.",
    fix="Use more GPUs, freeze the vision tower, offload (fsdp_config.param_offload, optimizer_offload) or use LoRA.",
    needs=["family"],
)
def memory(subject: Subject) -> Finding:
    model, text = subject.meta_model, subject.config.get_text_config()
    sizes = {id(parameter): parameter.numel() for parameter in model.parameters()}
    decoder = find_decoder(model)
    language = {
        id(parameter) for module in (decoder, model.get_output_embeddings()) for parameter in module.parameters()
    }
    total, num_text = sum(sizes.values()), sum(sizes[key] for key in language)
    largest = max(sum(parameter.numel() for parameter in layer.parameters()) for layer in decoder.layers)
    state = total * (COPY + MASTER + GRADIENT + MOMENTS) / subject.options.gpus
    heads = getattr(text, "num_key_value_heads", None) or text.num_attention_heads
    head_size = getattr(text, "head_dim", None) or text.hidden_size // text.num_attention_heads
    cache = 2 * 2 * text.num_hidden_layers * heads * head_size
    hidden = 2 * text.num_hidden_layers * text.hidden_size
    rows = (
        ("parameters", f"{count(total)}: text {count(num_text)}, vision {count(total - num_text)}"),
        (
            "training state",
            f"{size(state)} a GPU on {subject.options.gpus}: 18 bytes a parameter (bfloat16 copy 2, float32 "
            "parameter 4, gradient 4, Adam 8), sharded",
        ),
        ("one layer, gathered", size(COPY * largest)),
        (
            "activations",
            f"{size(1000 * hidden)} for 1000 tokens with gradient checkpointing, and "
            f"{size(1000 * 4 * text.vocab_size)} for their logits in float32",
        ),
        ("rollout weights", f"{size(2 * total)} in bfloat16, divided by rollout.tensor_model_parallel_size"),
        ("rollout KV cache", f"{size(cache)} a token in bfloat16, {size(1000 * cache)} for 1000"),
    )
    detail = f"{size(state)} of training state a GPU on {subject.options.gpus}"
    if subject.options.gpu_memory is None:
        return Finding(detail, rows=rows)
    needed = state + COPY * largest
    if needed > subject.options.gpu_memory * GIB:
        return Finding(
            detail,
            f"Training state and one layer take {size(needed)} of {subject.options.gpu_memory:g} GiB, without "
            "activations. Use more GPUs, offload, freeze the vision tower, or use LoRA.",
            rows,
        )
    return Finding(f"{detail}, of {subject.options.gpu_memory:g} GiB", rows=rows)
