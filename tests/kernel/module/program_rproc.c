// SPDX-License-Identifier: GPL-2.0
/*
 * Remote processor whose core is a program behind a virtio device
 *
 * Every remote processor driver of the kernel needs its SoC. This one needs a
 * virtio device of an id that nobody uses, whose device side is a program on
 * the host of a virtual machine: it sees the memory of the guest and acts as
 * the remote core. Queue 0 brings events from the core, queue 1 takes commands
 * to it; all words are little endian.
 *
 * Events are handled in process context, as most remote processor drivers do:
 * RPMsg takes mutexes when it receives.
 */

#include <linux/bitops.h>
#include <linux/completion.h>
#include <linux/dma-mapping.h>
#include <linux/elf.h>
#include <linux/err.h>
#include <linux/io.h>
#include <linux/module.h>
#include <linux/mutex.h>
#include <linux/remoteproc.h>
#include <linux/scatterlist.h>
#include <linux/sizes.h>
#include <linux/spinlock.h>
#include <linux/virtio.h>
#include <linux/virtio_config.h>
#include <linux/workqueue.h>

#include "remoteproc_internal.h"

#define VIRTIO_ID_PROGRAM_CORE	63

#define TCM_DA			0x10000000
#define TABLE_SIZE		SZ_4K	/* attach mode: the end of the memory */

#define NUM_EVENTS		16
#define NUM_KICKS		16	/* highest notify id + 1 that can be kicked */

#define ANSWER_TIMEOUT		(5 * HZ)

enum event_op {
	EVENT_NOTIFY	= 1,	/* arg: notify id */
	EVENT_CRASH	= 2,	/* arg: enum rproc_crash_type */
};

struct event {
	__le32 op;
	__le32 arg;
	__le64 reserved;
};

enum command_op {
	COMMAND_HELLO	= 1,	/* arg: attach mode; a: pa, b: size, c: da of the memory */
	COMMAND_START	= 2,	/* a: boot address, b: pa, c: size of the resource table */
	COMMAND_STOP	= 3,	/* arg: enum rproc_state */
	COMMAND_KICK	= 4,	/* arg: notify id */
	COMMAND_ATTACH	= 5,	/* b: pa, c: size of the resource table */
	COMMAND_DETACH	= 6,
};

struct command {
	struct {
		__le32 op;
		__le32 arg;
		__le64 a;
		__le64 b;
		__le64 c;
	} out;
	__le32 status;		/* from the core: 0 or an errno */
	bool queued;
	struct completion done;
};

struct program_core {
	struct virtio_device *vdev;
	struct rproc *rproc;

	void *tcm;
	dma_addr_t tcm_dma;
	size_t tcm_size;

	struct virtqueue *event_vq;
	struct work_struct event_work;
	struct event events[NUM_EVENTS];

	struct virtqueue *command_vq;
	spinlock_t command_lock;	/* of the queue and of command.queued */
	struct mutex request_lock;	/* one caller waits for an answer at a time */
	struct command request;
	struct command kicks[NUM_KICKS];
	bool gone;
};

static bool attach;
module_param(attach, bool, 0444);
MODULE_PARM_DESC(attach, "The core runs already, with its resource table in its memory");

static bool auto_boot;
module_param(auto_boot, bool, 0444);
MODULE_PARM_DESC(auto_boot, "Boot or attach to the core as soon as it is found");

static unsigned int tcm_kb = 512;
module_param(tcm_kb, uint, 0444);
MODULE_PARM_DESC(tcm_kb, "Size of the core's memory in KiB");

static char *fw = "core.elf";
module_param(fw, charp, 0444);
MODULE_PARM_DESC(fw, "Name of the firmware");

/* Commands. */

/* Takes back what the core has answered. Called with the lock held. */
static void reap_commands(struct program_core *core)
{
	struct command *command;
	unsigned int len;

	while ((command = virtqueue_get_buf(core->command_vq, &len))) {
		command->queued = false;
		complete(&command->done);
	}
}

static void command_answered(struct virtqueue *vq)
{
	struct program_core *core = vq->vdev->priv;
	unsigned long flags;

	spin_lock_irqsave(&core->command_lock, flags);
	reap_commands(core);
	spin_unlock_irqrestore(&core->command_lock, flags);
}

/* Called with the lock held. */
static int queue_command(struct program_core *core, struct command *command)
{
	struct scatterlist out, in, *sgs[] = { &out, &in };
	int ret;

	sg_init_one(&out, &command->out, sizeof(command->out));
	sg_init_one(&in, &command->status, sizeof(command->status));
	ret = virtqueue_add_sgs(core->command_vq, sgs, 1, 1, command, GFP_ATOMIC);
	if (ret)
		return ret;
	command->queued = true;
	virtqueue_kick(core->command_vq);
	return 0;
}

/* Gives an order and waits until the core has carried it out. */
static int order(struct program_core *core, enum command_op op, u32 arg,
		 u64 a, u64 b, u64 c)
{
	struct command *command = &core->request;
	unsigned long flags;
	int ret;

	mutex_lock(&core->request_lock);
	spin_lock_irqsave(&core->command_lock, flags);
	if (core->gone) {
		ret = -ENODEV;
	} else if (command->queued) {
		ret = -EBUSY;	/* an earlier one was never answered */
	} else {
		command->out.op = cpu_to_le32(op);
		command->out.arg = cpu_to_le32(arg);
		command->out.a = cpu_to_le64(a);
		command->out.b = cpu_to_le64(b);
		command->out.c = cpu_to_le64(c);
		command->status = 0;
		reinit_completion(&command->done);
		ret = queue_command(core, command);
	}
	spin_unlock_irqrestore(&core->command_lock, flags);

	if (!ret && !wait_for_completion_timeout(&command->done, ANSWER_TIMEOUT))
		ret = -ETIMEDOUT;
	if (!ret && command->queued)
		ret = -ENODEV;	/* woken by core_remove() */
	if (!ret) {
		u32 status = le32_to_cpu(command->status);

		if (status)
			ret = status <= MAX_ERRNO ? -(int)status : -EPROTO;
	}
	mutex_unlock(&core->request_lock);
	return ret;
}

/* Remote processor operations. */

static int core_prepare(struct rproc *rproc)
{
	struct program_core *core = rproc->priv;
	struct rproc_mem_entry *mem;
	int ret;

	/* Both lists are emptied whenever the processor goes offline. */
	mem = rproc_mem_entry_init(&core->vdev->dev, core->tcm, core->tcm_dma,
				   core->tcm_size, TCM_DA, NULL, NULL, "tcm");
	if (!mem)
		return -ENOMEM;
	ret = rproc_coredump_add_segment(rproc, TCM_DA, core->tcm_size);
	if (ret) {
		kfree(mem);
		return ret;
	}
	rproc_add_carveout(rproc, mem);
	return 0;
}

static int order_with_table(struct rproc *rproc, enum command_op op, u64 a)
{
	u64 pa = rproc->table_ptr ? virt_to_phys(rproc->table_ptr) : 0;

	return order(rproc->priv, op, 0, a, pa, pa ? rproc->table_sz : 0);
}

static int core_start(struct rproc *rproc)
{
	return order_with_table(rproc, COMMAND_START, rproc->bootaddr);
}

static int core_stop(struct rproc *rproc)
{
	struct program_core *core = rproc->priv;
	int ret;

	ret = order(core, COMMAND_STOP, rproc->state, 0, 0, 0);
	/* A core that is not there any more has stopped. */
	return ret == -ENODEV ? 0 : ret;
}

static int core_attach(struct rproc *rproc)
{
	return order_with_table(rproc, COMMAND_ATTACH, 0);
}

static int core_detach(struct rproc *rproc)
{
	return order(rproc->priv, COMMAND_DETACH, 0, 0, 0, 0);
}

static void core_kick(struct rproc *rproc, int notifyid)
{
	struct program_core *core = rproc->priv;
	struct command *command;
	unsigned long flags;

	if (notifyid < 0 || notifyid >= NUM_KICKS) {
		dev_warn_ratelimited(&rproc->dev, "cannot kick %d\n", notifyid);
		return;
	}
	command = &core->kicks[notifyid];
	spin_lock_irqsave(&core->command_lock, flags);
	/*
	 * The core answers a kick before it looks at the ring. So one that is
	 * still unanswered will show it what was added until now as well.
	 */
	reap_commands(core);
	if (!core->gone && !command->queued) {
		command->out.op = cpu_to_le32(COMMAND_KICK);
		command->out.arg = cpu_to_le32(notifyid);
		queue_command(core, command);
	}
	spin_unlock_irqrestore(&core->command_lock, flags);
}

static struct resource_table *core_get_loaded_rsc_table(struct rproc *rproc,
							size_t *size)
{
	struct program_core *core = rproc->priv;

	*size = TABLE_SIZE;
	return core->tcm + core->tcm_size - TABLE_SIZE;
}

static const struct rproc_ops core_ops = {
	.prepare		= core_prepare,
	.start			= core_start,
	.stop			= core_stop,
	.attach			= core_attach,
	.detach			= core_detach,
	.kick			= core_kick,
	.get_loaded_rsc_table	= core_get_loaded_rsc_table,
};

/* Events. */

static int post_event(struct program_core *core, struct event *event)
{
	struct scatterlist in;

	sg_init_one(&in, event, sizeof(*event));
	return virtqueue_add_inbuf(core->event_vq, &in, 1, event, GFP_KERNEL);
}

static void handle_event(struct program_core *core, const struct event *event)
{
	u32 op = le32_to_cpu(event->op);
	u32 arg = le32_to_cpu(event->arg);

	switch (op) {
	case EVENT_NOTIFY:
		rproc_vq_interrupt(core->rproc, arg);
		break;
	case EVENT_CRASH:
		rproc_report_crash(core->rproc, arg);
		break;
	default:
		dev_warn_ratelimited(&core->vdev->dev, "unknown event %u\n", op);
	}
}

static void event_work(struct work_struct *work)
{
	struct program_core *core = container_of(work, struct program_core, event_work);
	struct event *posted, event;
	unsigned int len;

	/* Enabling fails where more has arrived meanwhile. */
	do {
		virtqueue_disable_cb(core->event_vq);
		while ((posted = virtqueue_get_buf(core->event_vq, &len))) {
			event = *posted;
			post_event(core, posted);
			virtqueue_kick(core->event_vq);
			if (len == sizeof(event))
				handle_event(core, &event);
		}
	} while (!virtqueue_enable_cb(core->event_vq));
}

static void event_arrived(struct virtqueue *vq)
{
	struct program_core *core = vq->vdev->priv;

	virtqueue_disable_cb(vq);
	schedule_work(&core->event_work);
}

/* The virtio device. */

static int find_queues(struct program_core *core)
{
	vq_callback_t *callbacks[] = { event_arrived, command_answered };
	static const char * const names[] = { "events", "commands" };
	struct virtqueue *vqs[2];
	int i, ret;

	ret = virtio_find_vqs(core->vdev, 2, vqs, callbacks, names, NULL);
	if (ret)
		return ret;
	core->event_vq = vqs[0];
	core->command_vq = vqs[1];
	for (i = 0; i < NUM_EVENTS && !ret; i++)
		ret = post_event(core, &core->events[i]);
	if (ret)
		core->vdev->config->del_vqs(core->vdev);
	return ret;
}

static void leave_device(struct program_core *core)
{
	virtio_reset_device(core->vdev);
	cancel_work_sync(&core->event_work);
	core->vdev->config->del_vqs(core->vdev);
}

static int core_probe(struct virtio_device *vdev)
{
	struct device *dev = &vdev->dev;
	struct program_core *core;
	struct rproc *rproc;
	char name[32];
	int i, ret;

	if (tcm_kb < 2 * TABLE_SIZE / SZ_1K) {
		dev_err(dev, "tcm_kb=%u is too small\n", tcm_kb);
		return -EINVAL;
	}
	/* The core's addresses have 32 bits. */
	ret = dma_coerce_mask_and_coherent(dev, DMA_BIT_MASK(32));
	if (ret)
		return ret;

	snprintf(name, sizeof(name), "program-core%d", vdev->index);
	rproc = rproc_alloc(dev, name, &core_ops, fw, sizeof(*core));
	if (!rproc)
		return -ENOMEM;
	rproc->auto_boot = auto_boot;
	rproc_coredump_set_elf_info(rproc, ELFCLASS32, EM_NONE);

	core = rproc->priv;
	core->vdev = vdev;
	core->rproc = rproc;
	vdev->priv = core;
	spin_lock_init(&core->command_lock);
	mutex_init(&core->request_lock);
	INIT_WORK(&core->event_work, event_work);
	init_completion(&core->request.done);
	for (i = 0; i < NUM_KICKS; i++)
		init_completion(&core->kicks[i].done);

	core->tcm_size = tcm_kb * SZ_1K;
	core->tcm = dma_alloc_coherent(dev, core->tcm_size, &core->tcm_dma, GFP_KERNEL);
	if (!core->tcm) {
		ret = -ENOMEM;
		goto free_rproc;
	}
	ret = find_queues(core);
	if (ret)
		goto free_tcm;
	virtio_device_ready(vdev);
	virtqueue_kick(core->event_vq);

	ret = order(core, COMMAND_HELLO, attach, core->tcm_dma, core->tcm_size, TCM_DA);
	if (ret)
		goto leave;
	if (attach)
		rproc->state = RPROC_DETACHED;
	ret = rproc_add(rproc);
	if (ret)
		goto leave;
	return 0;

leave:
	leave_device(core);
free_tcm:
	dma_free_coherent(dev, core->tcm_size, core->tcm, core->tcm_dma);
free_rproc:
	rproc_free(rproc);
	return ret;
}

static void core_remove(struct virtio_device *vdev)
{
	struct program_core *core = vdev->priv;
	unsigned long flags;

	/* A core that has died would not answer; one that lives is not asked. */
	if (virtqueue_is_broken(core->command_vq)) {
		spin_lock_irqsave(&core->command_lock, flags);
		core->gone = true;
		complete(&core->request.done);
		spin_unlock_irqrestore(&core->command_lock, flags);
	}
	rproc_del(core->rproc);
	leave_device(core);
	dma_free_coherent(&vdev->dev, core->tcm_size, core->tcm, core->tcm_dma);
	rproc_free(core->rproc);
}

static const struct virtio_device_id core_ids[] = {
	{ VIRTIO_ID_PROGRAM_CORE, VIRTIO_DEV_ANY_ID },
	{ 0 },
};
MODULE_DEVICE_TABLE(virtio, core_ids);

static struct virtio_driver core_driver = {
	.driver.name	= KBUILD_MODNAME,
	.driver.owner	= THIS_MODULE,
	.id_table	= core_ids,
	.probe		= core_probe,
	.remove		= core_remove,
};
module_virtio_driver(core_driver);

MODULE_DESCRIPTION("Remote processor whose core is a program behind a virtio device");
MODULE_LICENSE("GPL");
