//! The image service.

use hypernetes_cri::v1;
use hypernetes_image::{ImageConfig, ImageError};
use tonic::Code;

use crate::bed::{Bed, refused};

fn spec(image: &str) -> Option<v1::ImageSpec> {
    Some(v1::ImageSpec {
        image: image.into(),
        ..Default::default()
    })
}

async fn status(bed: &mut Bed, image: &str) -> Option<v1::Image> {
    let request = v1::ImageStatusRequest {
        image: spec(image),
        verbose: false,
    };
    bed.images
        .image_status(request)
        .await
        .unwrap()
        .into_inner()
        .image
}

fn pull(image: &str) -> v1::PullImageRequest {
    v1::PullImageRequest {
        image: spec(image),
        ..Default::default()
    }
}

#[tokio::test]
async fn one_id_is_the_identity_everywhere() {
    let mut bed = Bed::new().await;
    let user = |user: &str| ImageConfig {
        user: user.into(),
        ..Default::default()
    };
    bed.runtime
        .add_remote_image("r.example/app:1", user("1003:1004"));
    bed.runtime
        .add_remote_image("r.example/named:1", user("www-data:x"));
    assert_eq!(status(&mut bed, "r.example/app:1").await, None, "no error");
    let pulled = bed
        .images
        .pull_image(pull("r.example/app:1"))
        .await
        .unwrap();
    let id = pulled.into_inner().image_ref;
    assert!(id.starts_with("sha256:"));
    let image = status(&mut bed, "r.example/app:1").await.unwrap();
    assert_eq!(image.id, id);
    assert_eq!(
        (image.uid.unwrap().value, image.username.as_str()),
        (1003, "")
    );
    assert_eq!(image.repo_tags, ["r.example/app:1"]);
    assert!(image.repo_digests[0].starts_with("r.example/app@sha256:") && image.size > 0);
    assert_eq!(status(&mut bed, &id).await.unwrap().id, id, "by its id");

    let named = bed
        .images
        .pull_image(pull("r.example/named:1"))
        .await
        .unwrap();
    let named = status(&mut bed, &named.into_inner().image_ref)
        .await
        .unwrap();
    assert_eq!((named.uid, named.username.as_str()), (None, "www-data"));

    let list = |image| v1::ListImagesRequest {
        filter: Some(v1::ImageFilter { image }),
    };
    let all = bed
        .images
        .list_images(v1::ListImagesRequest::default())
        .await;
    assert_eq!(all.unwrap().into_inner().images.len(), 3);
    let one = bed.images.list_images(list(spec("r.example/app:1"))).await;
    assert_eq!(one.unwrap().into_inner().images[0].id, id);

    let sandbox = bed.run(bed.pod("a")).await.unwrap();
    let mut config = Bed::container("c");
    config.image.as_mut().unwrap().image.clone_from(&id);
    let container = bed.create(&sandbox, config).await.unwrap();
    assert_eq!(bed.status(&container).await.unwrap().image_id, id);
}

#[tokio::test]
async fn removing_can_be_repeated_and_spares_what_is_in_use() {
    let mut bed = Bed::new().await;
    let remove = |image: &str| v1::RemoveImageRequest { image: spec(image) };
    let (_, container) = bed.running("a").await;
    refused(
        bed.images.remove_image(remove("web")).await,
        Code::FailedPrecondition,
        "in use",
    );
    let request = v1::RemoveContainerRequest {
        container_id: container,
    };
    bed.client.remove_container(request).await.unwrap();
    for _ in 0..2 {
        bed.images.remove_image(remove("web")).await.unwrap();
    }
    assert_eq!(status(&mut bed, "web").await, None);
    refused(
        bed.images.remove_image(remove("")).await,
        Code::InvalidArgument,
        "image.image",
    );
}

#[tokio::test]
async fn a_failed_pull_says_why() {
    let mut bed = Bed::new().await;
    refused(
        bed.images.pull_image(pull("gone:1")).await,
        Code::NotFound,
        "not found",
    );
    refused(
        bed.images.pull_image(pull("Not A Name")).await,
        Code::InvalidArgument,
        "image.image",
    );
    let away = ImageError::Unavailable {
        registry: "r.example".into(),
        message: "refused".into(),
    };
    bed.runtime.fail_next("pull_image", away.into());
    let status = bed.images.pull_image(pull("web")).await.unwrap_err();
    assert!(status.message().starts_with("RegistryUnavailable"));
}

#[tokio::test]
async fn file_systems_are_told_with_a_place_that_exists() {
    let mut bed = Bed::new().await;
    let info = bed.images.image_fs_info(v1::ImageFsInfoRequest {}).await;
    let info = info.unwrap().into_inner();
    for usage in [&info.image_filesystems[0], &info.container_filesystems[0]] {
        let place = &usage.fs_id.as_ref().unwrap().mountpoint;
        assert!(std::path::Path::new(place).is_dir());
        assert!(usage.timestamp > 0 && usage.used_bytes.is_some());
    }
}
