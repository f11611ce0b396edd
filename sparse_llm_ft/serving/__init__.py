"""What servers make of a PEFT adapter: their rules, an adapter's facts, and the commands that serve it. No torch."""
