/* SPDX-License-Identifier: BSD-3-Clause */
/*
 * Runs a program that ends with the one that started it: "tether PARENT PROGRAM [ARGUMENT...]".
 *
 * For programs that would live on when their host is killed, as QEMU does. PARENT is the process
 * id of the host, which must be our parent: a host that died before we asked to be told of it
 * never will be. The signal comes when the thread that started us ends.
 */
#define _GNU_SOURCE
#include <errno.h>
#include <signal.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/prctl.h>
#include <unistd.h>

#define EXIT_NOT_RUN 127 /* as a shell says it */

int main(int argc, char **argv)
{
    if (argc < 3) {
        fputs("usage: tether PARENT PROGRAM [ARGUMENT...]\n", stderr);
        return EXIT_NOT_RUN;
    }
    if (prctl(PR_SET_PDEATHSIG, SIGKILL) != 0) {
        fprintf(stderr, "tether: no parent-death signal: %s\n", strerror(errno));
        return EXIT_NOT_RUN;
    }
    if (getppid() != (pid_t)strtol(argv[1], NULL, 10))
        return EXIT_NOT_RUN; /* nobody is left to read a message */
    execvp(argv[2], argv + 2);
    fprintf(stderr, "tether: cannot run %s: %s\n", argv[2], strerror(errno));
    return EXIT_NOT_RUN;
}
