// What gcc's unwinder asks glibc for, answered with what musl has: where the tables of the object are that a place in the code belongs to.
// The struct is that of glibc's dlfcn.h.
#define _GNU_SOURCE
#include <link.h>
#include <pthread.h>
#include <stdint.h>

// The unwinder calls these where there are threads, by weak names, which alone take nothing out of a static library.
__attribute__((used)) static void *const called[] = {
    (void *)pthread_key_create, (void *)pthread_getspecific, (void *)pthread_setspecific,
    (void *)pthread_once, (void *)pthread_mutex_lock, (void *)pthread_mutex_unlock,
};

struct found {
    unsigned long long flags;
    void *start, *end;
    struct link_map *map;
    void *eh_frame;
    unsigned long long reserved[7];
};

struct search {
    uintptr_t place;
    struct found *found;
};

static int look(struct dl_phdr_info *object, size_t size, void *given) {
    (void)size;
    struct search *search = given;
    int inside = 0;
    for (int i = 0; i < object->dlpi_phnum; i++) {
        const ElfW(Phdr) *part = &object->dlpi_phdr[i];
        uintptr_t start = object->dlpi_addr + part->p_vaddr;
        if (part->p_type == PT_GNU_EH_FRAME) search->found->eh_frame = (void *)start;
        if (part->p_type != PT_LOAD || search->place < start || search->place - start >= part->p_memsz) continue;
        inside = 1;
        search->found->start = (void *)start;
        search->found->end = (void *)(start + part->p_memsz);
    }
    if (inside && search->found->eh_frame != 0) return 1;
    search->found->eh_frame = 0;
    return 0;
}

int _dl_find_object(void *place, struct found *found) {
    struct search search = {(uintptr_t)place, found};
    found->flags = 0;
    found->map = 0;
    found->eh_frame = 0;
    return dl_iterate_phdr(look, &search) == 1 ? 0 : -1;
}
