# SPDX-License-Identifier: Apache-2.0
"""Training-free intervention: more attention to the image, less to the system turn, by rescaling keys.

`spec` says what an intervention is, `transformers_hook` and `vllm_hook` do it, `answers` generates with either, `sweep`
compares settings, `command` is the command line. Nothing is imported here, so that `avar --help` is quick.
"""
