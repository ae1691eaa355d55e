# SPDX-License-Identifier: Apache-2.0
"""`avar eval`: the accuracy of a checkpoint, answer by answer, over an OpenAI-compatible server.

| module | what |
| --- | --- |
| `items` | one question with its images; rows of a parquet file in verl's RL layout |
| `benchmarks` | the seven benchmarks of the paper, `tasks/*.yaml` |
| `grade` | right or wrong, by the reward's own grader |
| `records` | one line for each answer; what a run needs to go on after it was killed |
| `client`, `server` | asking a server; starting and stopping a vLLM of one's own |
| `statistics`, `tables` | comparisons on the same items; the paper's ablation table |
| `run`, `command` | the command |
"""
