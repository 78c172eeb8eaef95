"""CLUE and FewCLUE as task files of lm-evaluation-harness."""
