"""What all stages share: settings, the stage folder, records, the order of batches, trainers, several processes. Start
with `stage`.
"""
