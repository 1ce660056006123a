/* The guest of tests/qemu.rs: PID 1 that does one thing, chosen by role= on the kernel command
 * line (the kernel hands parameters that it does not know to init as environment).
 *   echo    sends back what arrives on the first virtio port, says which SCSI disks it sees
 *   panic   ends, which is a kernel panic
 *   reboot  reboots
 *   chatter writes to the console for ever
 *   count   counts on the console, twenty a second
 */
#include <dirent.h>
#include <errno.h>
#include <fcntl.h>
#include <poll.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/mount.h>
#include <sys/reboot.h>
#include <sys/stat.h>
#include <sys/syscall.h>
#include <unistd.h>

static char known[256];

static void look_for_disks(void) {
    char seen[256] = {0};
    DIR *dir = opendir("/sys/bus/scsi/devices");
    if (!dir) return;
    for (struct dirent *e; (e = readdir(dir));) {
        int host, channel, id, lun;
        if (sscanf(e->d_name, "%d:%d:%d:%d", &host, &channel, &id, &lun) != 4 || id > 255) continue;
        seen[id] = 1;
        if (known[id]) continue;
        char path[512], name[64] = "";
        snprintf(path, sizeof path, "/sys/bus/scsi/devices/%s/block", e->d_name);
        DIR *block = opendir(path);
        if (!block) continue;
        for (struct dirent *b; (b = readdir(block));)
            if (b->d_name[0] != '.') snprintf(name, sizeof name, "%s", b->d_name);
        closedir(block);
        if (!name[0]) continue;
        snprintf(path, sizeof path, "/dev/%s", name);
        char text[17] = "";
        int fd = open(path, O_RDONLY);
        if (fd < 0 || read(fd, text, 16) != 16) { if (fd >= 0) close(fd); continue; }
        close(fd);
        text[16] = 0;
        fd = open(path, O_WRONLY);
        const char *mode = "ro";
        if (fd >= 0) {
            char sector[512] __attribute__((aligned(512)));
            memset(sector, 'G', sizeof sector);
            if (pwrite(fd, sector, 512, 512) == 512 && fsync(fd) == 0) mode = "rw";
            close(fd);
        }
        known[id] = 1;
        printf("DISK+ %d %s %s\n", id, mode, text);
    }
    closedir(dir);
    for (int id = 0; id < 256; id++)
        if (known[id] && !seen[id]) { known[id] = 0; printf("DISK- %d\n", id); }
}

/* As HyperStart does: the files that `order` names, in that order. */
static void load_modules(void) {
    FILE *order = fopen("/lib/modules/hypernetes/order", "r");
    char name[128], path[256];
    while (order && fscanf(order, "%127s", name) == 1) {
        snprintf(path, sizeof path, "/lib/modules/hypernetes/%s", name);
        int fd = open(path, O_RDONLY);
        if (syscall(SYS_finit_module, fd, "", 0) && errno != EEXIST) printf("MODULE %s: %m\n", name);
        close(fd);
    }
    if (order) fclose(order);
}

/* As HyperStart does: or the kernel would put pages of its own there, which cannot be taken back. */
static void keep_more_memory_movable(void) {
    int fd = open("/sys/devices/system/memory/auto_online_blocks", O_WRONLY);
    if (fd >= 0 && write(fd, "online_movable", 14) != 14) printf("MEMORY: %m\n");
    close(fd);
}

int main(void) {
    const char *role = getenv("role") ? getenv("role") : "echo";
    mkdir("/proc", 0755); mkdir("/sys", 0755); mkdir("/dev", 0755);
    mount("proc", "/proc", "proc", 0, 0);
    mount("sysfs", "/sys", "sysfs", 0, 0);
    mount("devtmpfs", "/dev", "devtmpfs", 0, 0);
    int tty = open("/dev/console", O_RDWR);
    if (tty >= 0) { dup2(tty, 0); dup2(tty, 1); dup2(tty, 2); }
    setvbuf(stdout, 0, _IONBF, 0);
    load_modules();
    keep_more_memory_movable();
    printf("GUEST READY %s\n", role);
    if (!strcmp(role, "panic")) return 1;
    if (!strcmp(role, "reboot")) { sync(); reboot(RB_AUTOBOOT); }
    if (!strcmp(role, "chatter")) for (;;) printf("\033[31mchatter chatter chatter chatter\n");
    if (!strcmp(role, "count")) for (int n = 0;; n++) { printf("COUNT %d\n", n); look_for_disks(); usleep(50000); }
    int port = -1;
    for (;;) {
        if (port < 0) port = open("/dev/vport0p1", O_RDWR | O_NONBLOCK);
        struct pollfd p = { port, POLLIN, 0 };
        poll(&p, 1, 20);
        if (p.revents) {
            char buf[4096];
            ssize_t n = read(port, buf, sizeof buf);
            if (n > 0) { for (ssize_t w = 0, m; w < n;) { m = write(port, buf + w, n - w); if (m > 0) w += m; } }
            else if (n == 0 || errno != EAGAIN) { close(port); port = -1; usleep(20000); }
        }
        look_for_disks();
    }
}
