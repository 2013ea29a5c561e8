"""What a machine has, what a clip costs, and which way of keeping the parts fits. Imports no torch."""
