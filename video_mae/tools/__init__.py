"""What a person runs beside training: pack, doctor, demo, reconstruct."""
