"""Language models as policies: tasks, evaluation, sampling into the shared rollout buffer, bridges.

Nothing here is imported by the core; ``transformers`` and ``peft`` (extra ``llm``) are imported where they are used.
"""
