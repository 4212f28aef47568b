"""Results for people: in a terminal, as one page, as tables for other documents. Reads run folders, computes no score.
Start with `runs`, then `page`.
"""
