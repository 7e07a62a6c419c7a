"""Fused FP8 block-scaled MoE of one DeepSeek-V3/R1 expert-parallel rank, in Triton."""

from __future__ import annotations

import torch

from .contract import check_arguments, gpu_properties
from .finalize import finalize
from .fused_gemms import fused_gemms
from .gemm1_swiglu import gemm1_swiglu
from .gemm2 import gemm2
from .launch import on_device
from .routing import route
from .tuning import select_config
from .workspace import allocate


def run(
    routing_logits: torch.Tensor,
    routing_bias: torch.Tensor,
    hidden_states: torch.Tensor,
    hidden_states_scale: torch.Tensor,
    gemm1_weights: torch.Tensor,
    gemm1_weights_scale: torch.Tensor,
    gemm2_weights: torch.Tensor,
    gemm2_weights_scale: torch.Tensor,
    local_expert_offset: int,
    routed_scaling_factor: float,
    output: torch.Tensor,
) -> None:
    """Write the rank's MoE output for T tokens (0 <= T <= 65536) into `output`.

    Args:
        routing_logits: [T, 256] float32.
        routing_bias: [256] bfloat16, used for the selection only.
        hidden_states: [T, 7168] float8_e4m3fn.
        hidden_states_scale: [56, T] float32, one signed scale per token and 128 values.
        gemm1_weights: [32, 4096, 7168] float8_e4m3fn, up rows before gate rows.
        gemm1_weights_scale: [32, 32, 56] float32, one signed scale per 128x128 block.
        gemm2_weights: [32, 7168, 2048] float8_e4m3fn.
        gemm2_weights_scale: [32, 56, 16] float32.
        local_expert_offset: global id of local expert 0; experts outside 0..255 do not exist.
        routed_scaling_factor: multiplies the normalised routing weights.
        output: [T, 7168] bfloat16, every element is overwritten.

    Raises:
        TypeError, ValueError: an argument is not as above, see `contract.check_arguments`.
        RuntimeError: the GPU is not supported. In every case nothing has been launched or written.
    """
    num_tokens = check_arguments(locals())
    num_sms, capability = gpu_properties(hidden_states.device)
    if num_tokens == 0:
        return
    config = select_config(num_tokens, num_sms, capability)
    with on_device(hidden_states.device):
        workspace = allocate(num_tokens, *gemm2_weights.shape[1:], config, hidden_states.device)
        route(routing_logits, routing_bias, local_expert_offset, routed_scaling_factor, workspace, config)
        if config.fusion:
            fused_gemms(hidden_states, hidden_states_scale, gemm1_weights, gemm1_weights_scale,
                        gemm2_weights, gemm2_weights_scale, workspace, config)
        else:
            gemm1_swiglu(hidden_states, hidden_states_scale, gemm1_weights, gemm1_weights_scale, workspace, config,
                         output)
            gemm2(gemm2_weights, gemm2_weights_scale, workspace, config)
        finalize(workspace, output, config)
