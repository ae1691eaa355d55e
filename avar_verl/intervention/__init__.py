# SPDX-License-Identifier: Apache-2.0
"""Training-free intervention: more attention to the image, less to the system turn, by rescaling keys.

`spec` defines an intervention; `transformers_hook` and `vllm_hook` apply it. Nothing is imported here, so that `avar
--help` stays fast.
"""
