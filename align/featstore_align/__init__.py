"""Frame rates and their conversion: features at one rate re-expressed at another. Arrays in, arrays out."""
