"""Write-back: dirty data, frozen at one instant and written to the image through the redo journal."""
