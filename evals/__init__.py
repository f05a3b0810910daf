"""Evaluation: the gap protocol's parts, and public benchmarks with their official rules.

README.md says what is where and how to add a benchmark. Answers come in the order of the records.
Shares are 0 to 1 where the official tool prints them so, and percent where a docstring says so.
"""
