package catalog

import (
	"errors"
	"fmt"
	"os"

	"golang.org/x/sys/unix"

	"github.com/atollstore/atoll/internal/atoll"
)

// lockFile takes a lock that ends with the process; ErrBusy if another holds it.
func lockFile(path string) (*os.File, error) {
	f, err := os.OpenFile(path, os.O_RDWR|os.O_CREATE, 0o600)
	if err != nil {
		return nil, fmt.Errorf("lock %s: %w: %w", path, err, atoll.ErrIO)
	}
	err = unix.Flock(int(f.Fd()), unix.LOCK_EX|unix.LOCK_NB)
	if err == nil {
		return f, nil
	}
	f.Close()
	if errors.Is(err, unix.EWOULDBLOCK) {
		return nil, fmt.Errorf("lock %s: another server runs on it: %w", path, atoll.ErrBusy)
	}
	return nil, fmt.Errorf("lock %s: %w: %w", path, err, atoll.ErrIO)
}
