"""What was asked for (``schema``), how it is read (``load``), and what will happen here (``plan``)."""
