"""Linux's own remoteproc and rpmsg, through sysfs and device nodes."""
