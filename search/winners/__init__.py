"""What becomes of the best trials: trained again, measured once, exported, repeated, used."""
