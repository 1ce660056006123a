/* The smallest guest program: says that the kernel has booted, then answers each line that it is sent. The
 * floor that the start of a pod is measured against, by a boot and by a restore. */
#include <sys/mount.h>
#include <unistd.h>
#include <fcntl.h>

static int say(int console, const char *text, unsigned length) {
    return write(console, text, length) == (ssize_t)length;
}

int main(void) {
    int console = open("/dev/console", O_RDWR);
    if (console < 0) {
        mount("devtmpfs", "/dev", "devtmpfs", 0, "");
        console = open("/dev/console", O_RDWR);
    }
    static const char ready[] = "BARE-INIT-READY\n", answer[] = "BARE-INIT-ANSWER\n";
    if (!say(console, ready, sizeof ready - 1)) return 1;
    char line[64];
    while (read(console, line, sizeof line) > 0)
        if (!say(console, answer, sizeof answer - 1)) return 1;
    return 1;
}
