"""What models of other tasks than captioning give beside the reference: one file per task."""
