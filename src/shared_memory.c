/*
 * shared_memory.c
 *		Pieces of shared memory, each with a lock of its own name.
 *
 * The server asks preloaded libraries for what they need by two hooks, of
 * which each library has one link in a chain: here is this one's.
 */
#include "postgres.h"

#include "mb/pg_wchar.h"
#include "miscadmin.h"
#include "storage/ipc.h"
#include "storage/shmem.h"

#include "shared_memory.h"

typedef struct Piece
{
	const char *name;
	Size		(*size) (void);
	void	  **memory;
	LWLock	  **lock;
} Piece;

#define MAX_PIECES	3

static Piece pieces[MAX_PIECES];
static int	npieces = 0;
static shmem_request_hook_type previous_shmem_request = NULL;
static shmem_startup_hook_type previous_shmem_startup = NULL;

static void
shmem_request(void)
{
	if (previous_shmem_request)
		previous_shmem_request();
	for (int i = 0; i < npieces; i++)
	{
		RequestAddinShmemSpace(pieces[i].size());
		RequestNamedLWLockTranche(pieces[i].name, 1);
	}
}

static void
shmem_startup(void)
{
	if (previous_shmem_startup)
		previous_shmem_startup();
	LWLockAcquire(AddinShmemInitLock, LW_EXCLUSIVE);
	for (int i = 0; i < npieces; i++)
	{
		bool		found;
		Size		size = pieces[i].size();

		*pieces[i].memory = ShmemInitStruct(pieces[i].name, size, &found);
		if (!found)
			memset(*pieces[i].memory, 0, size);
		*pieces[i].lock = &GetNamedLWLockTranche(pieces[i].name)->lock;
	}
	LWLockRelease(AddinShmemInitLock);
}

/*
 * shared_memory_request
 *		Asks for a piece of shared memory, zeroed, of a size in bytes that is
 *		known when the server has read its settings, and for a named LWLock;
 *		both pointers are set when the server starts. To be called while the
 *		library is preloaded: where it is not, *memory stays as it is.
 */
void
shared_memory_request(const char *name, Size (*size) (void), void **memory, LWLock **lock)
{
	Assert(npieces < MAX_PIECES);
	if (npieces == 0)
	{
		previous_shmem_request = shmem_request_hook;
		shmem_request_hook = shmem_request;
		previous_shmem_startup = shmem_startup_hook;
		shmem_startup_hook = shmem_startup;
	}
	pieces[npieces++] = (Piece) {name, size, memory, lock};
}

/* Keeps as many whole characters of a text as there is room for. */
void
shared_memory_keep_text(char *to, Size size, const char *from)
{
	int			length = pg_mbcliplen(from, strlen(from), size - 1);

	memcpy(to, from, length);
	to[length] = '\0';
}
