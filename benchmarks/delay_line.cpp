// A line that delays: what a host sends comes out at the switch some milliseconds later. For netlab.sh --delay, where the kernel has no netem.
//
//   delay_line HOST DEVICE SWITCH PORT MILLISECONDS
//
// It makes a TAP device DEVICE in the network namespace HOST and one PORT in SWITCH, says "ready", and carries frames between them until it is
// killed, which takes both devices away: from DEVICE to PORT after the delay, in order, and the other way at once. Frames of TCP segmentation offload
// pass whole, with their headers for it, so that few calls carry much. What waits has room for all that the link's rate lets through.
#include <fcntl.h>
#include <linux/if.h>
#include <linux/if_tun.h>
#include <poll.h>
#include <sched.h>
#include <sys/ioctl.h>
#include <unistd.h>

#include <cerrno>
#include <chrono>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <deque>
#include <string>
#include <vector>

namespace {

using Clock = std::chrono::steady_clock;
constexpr std::size_t kLargest = 65536 + 256;  // a frame, with headers

[[noreturn]] void fail(const std::string &what) {
    std::fprintf(stderr, "delay_line: %s: %s\n", what.c_str(), std::strerror(errno));
    std::exit(1);
}

// The process stays in the namespace.
int make_tap(const std::string &space, const std::string &name) {
    const int where = open(("/run/netns/" + space).c_str(), O_RDONLY | O_CLOEXEC);
    if (where < 0 || setns(where, CLONE_NEWNET) != 0) fail("the network namespace " + space + " cannot be entered");
    close(where);
    const int tap = open("/dev/net/tun", O_RDWR | O_NONBLOCK | O_CLOEXEC);
    if (tap < 0) fail("/dev/net/tun cannot be opened");
    ifreq request{};
    request.ifr_flags = IFF_TAP | IFF_NO_PI | IFF_VNET_HDR;
    std::strncpy(request.ifr_name, name.c_str(), IFNAMSIZ - 1);
    if (ioctl(tap, TUNSETIFF, &request) != 0) fail("the TAP device " + name + " cannot be made");
    if (ioctl(tap, TUNSETOFFLOAD, TUN_F_CSUM | TUN_F_TSO4 | TUN_F_TSO6) != 0) fail("segmentation offload cannot be had for " + name);
    return tap;
}

struct Frame {
    Clock::time_point due;
    std::vector<char> bytes;
};

void put(int tap, const char *bytes, std::size_t size) {
    // A device that is down, or out of memory, loses frames as any wire does.
    while (write(tap, bytes, size) < 0 && errno == EINTR) {
    }
}

}  // namespace

int main(int count, char **arguments) {
    if (count != 6) {
        std::fprintf(stderr, "usage: delay_line HOST DEVICE SWITCH PORT MILLISECONDS\n");
        return 2;
    }
    const int host = make_tap(arguments[1], arguments[2]);
    const int port = make_tap(arguments[3], arguments[4]);
    const auto delay = std::chrono::duration_cast<Clock::duration>(std::chrono::duration<double, std::milli>(std::atof(arguments[5])));
    std::printf("ready\n");
    std::fflush(stdout);
    close(STDOUT_FILENO);

    std::vector<char> buffer(kLargest);
    std::deque<Frame> waiting;
    pollfd both[2] = {{host, POLLIN, 0}, {port, POLLIN, 0}};
    while (true) {
        timespec pause{};
        if (!waiting.empty()) {
            const auto left = std::chrono::duration_cast<std::chrono::nanoseconds>(waiting.front().due - Clock::now()).count();
            if (left > 0) pause = {static_cast<time_t>(left / 1000000000), static_cast<long>(left % 1000000000)};
        }
        if (ppoll(both, 2, waiting.empty() ? nullptr : &pause, nullptr) < 0 && errno != EINTR) fail("poll");
        ssize_t size;
        for (int k = 0; k < 64 && (size = read(host, buffer.data(), buffer.size())) > 0; k++)
            waiting.push_back({Clock::now() + delay, std::vector<char>(buffer.begin(), buffer.begin() + size)});
        for (int k = 0; k < 64 && (size = read(port, buffer.data(), buffer.size())) > 0; k++) put(host, buffer.data(), static_cast<std::size_t>(size));
        for (const auto now = Clock::now(); !waiting.empty() && waiting.front().due <= now; waiting.pop_front())
            put(port, waiting.front().bytes.data(), waiting.front().bytes.size());
    }
}
