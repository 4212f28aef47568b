"""What all stages share: settings, the stage folder, records, the order of batches, trainers, several processes.

May use `almost_eval`, and no other room of this package. Start with `stage`.
"""
