package host

import (
	"errors"
	"fmt"
	"io/fs"
	"path"
	"strings"
	"syscall"

	"golang.org/x/sys/unix"

	"github.com/atollstore/atoll/internal/atoll"
)

// kindOf maps an error of the operating system to its kind in package atoll.
func kindOf(err error) error {
	var errno syscall.Errno
	if !errors.As(err, &errno) {
		return kindOfPortable(err)
	}
	switch errno {
	case unix.ENOENT, unix.ENOTDIR:
		return atoll.ErrNotExist
	case unix.EEXIST, unix.ENOTEMPTY:
		return atoll.ErrExist
	case unix.EACCES, unix.EPERM:
		return atoll.ErrDenied
	case unix.ENOSPC, unix.EDQUOT:
		return atoll.ErrNoSpace
	case unix.EROFS:
		return atoll.ErrReadOnly
	case unix.EFBIG:
		return atoll.ErrTooLarge
	case unix.EOPNOTSUPP, unix.ENOSYS:
		return atoll.ErrUnsupported
	case unix.EBUSY, unix.EAGAIN, unix.EMFILE, unix.ENFILE:
		return atoll.ErrBusy
	case unix.EISDIR, unix.ENAMETOOLONG, unix.ELOOP:
		return atoll.ErrInvalid
	case unix.EBADF:
		return atoll.ErrClosed
	}
	return atoll.ErrIO
}

// kindOfPortable maps the errors that package os makes itself.
func kindOfPortable(err error) error {
	switch {
	case errors.Is(err, fs.ErrNotExist):
		return atoll.ErrNotExist
	case errors.Is(err, fs.ErrExist):
		return atoll.ErrExist
	case errors.Is(err, fs.ErrClosed):
		return atoll.ErrClosed
	case errors.Is(err, fs.ErrPermission):
		return atoll.ErrDenied
	}
	return atoll.ErrIO
}

// wrap gives err the kind of package atoll and keeps its text.
func wrap(verb, name string, err error) error {
	if err == nil {
		return nil
	}
	var errno syscall.Errno
	if errors.As(err, &errno) {
		return fmt.Errorf("%s %s: %w (%s)", verb, name, kindOf(err), errno.Error())
	}
	return fmt.Errorf("%s %s: %w (%v)", verb, name, kindOf(err), err)
}

// CheckName returns ErrInvalid unless name can name something in an FS: slash
// separated, not absolute, without empty, "." and ".." elements, NUL bytes or
// elements over 255 bytes. The root is "." and allowed where a directory is
// meant.
func CheckName(name string, dir bool) error {
	if name == "." && dir {
		return nil
	}
	if name == "." || !fs.ValidPath(name) || strings.ContainsRune(name, 0) {
		return fmt.Errorf("use name %q: %w", name, atoll.ErrInvalid)
	}
	for rest := name; rest != ""; {
		var elem string
		elem, rest, _ = strings.Cut(rest, "/")
		if len(elem) > 255 {
			return fmt.Errorf("use name %.40q…: element of %d bytes: %w", elem, len(elem), atoll.ErrInvalid)
		}
	}
	return nil
}

// matchName reports whether name matches the glob pattern. A pattern without a
// slash is compared with the last element; the empty one matches everything.
func matchName(pattern, name string) bool {
	if pattern == "" {
		return true
	}
	if !strings.Contains(pattern, "/") {
		name = path.Base(name)
	}
	ok, err := path.Match(pattern, name)
	return ok && err == nil
}
