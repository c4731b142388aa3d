package curve

import (
	"crypto/rand"
	"sync"
	"time"
)

const (
	// mountGrace is how long an opened volume counts as mounted before its
	// client is connected to it.
	mountGrace = 5 * time.Second
	// maxMounts is when forgotten ones are looked for.
	maxMounts = 4096
)

// mounts knows which volumes were opened through this gateway. An entry says
// that a volume is mounted only while it is young or a client is connected: a
// client that died leaves nothing behind.
type mounts struct {
	mu struct {
		sync.Mutex // held for memory work only
		sessions   map[string]session
		media      map[string]int // sessions by medium
	}
}

type session struct {
	medium string
	opened time.Time
}

func (m *mounts) init() {
	m.mu.sessions, m.mu.media = map[string]session{}, map[string]int{}
}

// add notes an open and returns its session's name.
func (m *mounts) add(medium string) string {
	name := rand.Text()
	m.mu.Lock()
	defer m.mu.Unlock()
	if len(m.mu.sessions) >= maxMounts {
		for old, s := range m.mu.sessions { // of those in use the connection tells
			if time.Since(s.opened) > mountGrace {
				m.drop(old)
			}
		}
	}
	m.mu.sessions[name] = session{medium, time.Now()}
	m.mu.media[medium]++
	return name
}

// remove forgets a session; one that is not known is none.
func (m *mounts) remove(name string) {
	m.mu.Lock()
	defer m.mu.Unlock()
	m.drop(name)
}

// drop is remove with the lock held.
func (m *mounts) drop(name string) {
	s, ok := m.mu.sessions[name]
	if !ok {
		return
	}
	delete(m.mu.sessions, name)
	if m.mu.media[s.medium]--; m.mu.media[s.medium] == 0 {
		delete(m.mu.media, s.medium)
	}
}

// state tells whether sessions of a medium are known, and whether one is so
// young that its client may not be connected yet.
func (m *mounts) state(medium string) (known, young bool) {
	m.mu.Lock()
	defer m.mu.Unlock()
	if m.mu.media[medium] == 0 {
		return false, false
	}
	for _, s := range m.mu.sessions {
		if s.medium == medium && time.Since(s.opened) < mountGrace {
			return true, true
		}
	}
	return true, false
}
