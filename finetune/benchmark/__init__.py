"""python -m finetune.benchmark: tasks of lm-evaluation-harness, scored on length-sorted trees."""
