"""How the tiny embedded policy is made: supervised learning of primitive skills on synthetic clips."""
