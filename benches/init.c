/* The smallest guest program: says that the kernel has booted, then sleeps. The floor that the
 * start of a pod is measured against. */
#include <sys/mount.h>
#include <unistd.h>
#include <fcntl.h>

int main(void) {
    int console = open("/dev/console", O_WRONLY);
    if (console < 0) {
        mount("devtmpfs", "/dev", "devtmpfs", 0, "");
        console = open("/dev/console", O_WRONLY);
    }
    static const char ready[] = "BARE-INIT-READY\n";
    if (write(console, ready, sizeof ready - 1) < 0) return 1;
    for (;;) pause();
}
