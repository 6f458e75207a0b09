"""What runs beside training: tracking, pictures, quality figures and guards."""
