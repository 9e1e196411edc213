"""AOTInductor packages: networks compiled to machine code for the CPU."""
