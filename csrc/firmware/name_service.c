/* SPDX-License-Identifier: BSD-3-Clause */
#include "freestanding.h"
#include "rpmsg_device.h"

enum rpmsg_link rpmsg_announce(struct rpmsg_device *device, const char *name, uint32_t address,
                               uint32_t flags)
{
    struct rpmsg_ns ns;

    if ((device->features & TABLE_FEATURE_NS) == 0)
        return RPMSG_UP;
    memset(&ns, 0, sizeof ns);
    for (uint32_t i = 0; i < RPMSG_NAME_SIZE && name[i] != '\0'; i++)
        ns.name[i] = name[i];
    ns.address = address;
    ns.flags = flags;
    return rpmsg_send(device, address, RPMSG_NS_ADDRESS, &ns, sizeof ns);
}
