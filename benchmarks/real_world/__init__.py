"""ALMoST on real language models of 135 and 270 million weights: a recipe, its measurement, its ablations, one page.

    python -m benchmarks.real_world --data-root ../shared/data --models runs/models --output runs/real-world
    python -m benchmarks.real_world ... --recipe smollm2-135m
    python -m benchmarks.real_world ... --form quick                      # `make real`: a quarter of an hour
    python -m benchmarks.real_world ... --parts data,recipe --until responses

It runs `almost-train run RECIPE` with the models in the folder `--models`, then measures. Every part goes on where it
was killed and is skipped where it is done. figures.json, figures.md and page.html are written anew from what there is.

    data       preferences of other sources and held-out prompts (data.py)
    recipe     prompts ... RLSF, in OUTPUT/recipe
    second     a reward model of people's preferences, which no stage of the recipe sees
    variants   other filters, unguided self-play, other training (variants.py); takes hours, so only where it is named
    rewards    reward models on Static HHH, on people's pairs and on held-out synthetic pairs, beside "the longer wins"
    policies   vanilla, SFT, RLSF: Static HHH, TruthfulQA, MMLU by letters and by words, answers, length, refusals, the
               second model's reward of held-out prompts; paired with vanilla and, for RLSF, with SFT
    best-of    the second model's reward of the best of N self-play candidates
    labels     how often "larger and better prompted" is better: by rules, and by nearness to GPT-4's archived answers

MMLU is asked by letters and by words: models of this size are at chance with letters, where no loss can show.
"""
