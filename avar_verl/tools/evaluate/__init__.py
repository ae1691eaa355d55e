# SPDX-License-Identifier: Apache-2.0
"""`avar eval`: the accuracy of a checkpoint, answer by answer, over an OpenAI-compatible server.

| module | what |
| --- | --- |
| `items` | one question with its images; rows of a parquet file in verl's RL layout |
| `benchmarks` | the seven benchmarks of the paper, `tasks/*.yaml` |
| `grade` | grades answers with the reward's grader |
| `records` | one line per answer, from which a killed run resumes |
| `client`, `server` | requests to a server; starting and stopping a vLLM server |
| `statistics`, `tables` | comparisons on the same items; the paper's ablation table |
| `run`, `command` | the command |
"""
